"""Packages: the library `megatron_fuse` and, released with it but free of it, `fuse_kernels`."""

from setuptools import find_packages, setup

setup(
    name="megatron-fuse",
    version="0.1.0",
    description="Progressive fusion of several large language models into one, on Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_fuse", "megatron_fuse.*"]), "fuse_kernels"],
    # kernels/ itself is no package: a top-level `kernels` would shadow Hugging Face's package of that name.
    package_dir={"fuse_kernels": "kernels/fuse_kernels"},
    package_data={"megatron_fuse.evaluation": ["tasks/*.yaml"]},
    install_requires=[
        "torch>=2.7",
        "megatron-core>=0.16,<0.20",  # Python 3.11 gets 0.16.1; megatron_fuse/runtime/megatron_versions.py holds the differences
        "numpy>=2",
        "transformers>=5",
        "tokenizers",
        "sentencepiece",
        "tiktoken",
        "safetensors",
        "xxhash",  # checksums of checkpoints and exports
        "psutil",  # whether the process that started a rank is still there
        "pydantic>=2",
        "PyYAML",
        "jinja2",
        "protobuf",  # to read SentencePiece models
        "tensorboard",
        "rapidfuzz",  # edit distances of the `mined` vocabulary map
        "matplotlib",
    ],
    extras_require={
        # The range that megatron-core 0.16 declares; later ones declare none. Without a core library (core_cu12, core_cu13) it does
        # not import.
        "gpu-cu12": ["transformer-engine[core_cu12,pytorch]>=2.9,<2.12", "triton"],
        "gpu-cu13": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "triton"],
        "parquet": ["pyarrow"],
        "server": ["openai"],  # answers from an OpenAI-compatible server
        "reference": ["sacrebleu", "rouge-score", "bert-score"],  # answers scored against the ground truth
        "merge": ["mergekit>=0.1.5"],  # merging baselines: SLERP, TIES, DARE
        "gguf": ["gguf>=0.10", "accelerate"],  # conversion of GGUF files
        "eval": ["lm-eval>=0.4.13,<0.5", "accelerate"],  # lm-evaluation-harness, for models in process
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "pyarrow",
            "triton",  # interpreted, where there is no GPU
            "sacrebleu",
            "rouge-score",
            "bert-score",
            "mergekit",
            "gguf",
            "lm-eval>=0.4.13,<0.5",
            "transformers[serving]",  # with openai: the server that tests ask
        ],
    },
)
