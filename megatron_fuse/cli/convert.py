"""Convert Hugging Face directories, Megatron checkpoints or a GGUF file, in one process, without a GPU.

    megatron-fuse convert --from-megatron runs/x/training/checkpoints --reference models/target --output fused
    megatron-fuse convert --from-hugging-face models/target --output checkpoints
    megatron-fuse convert --from-gguf X.Q4_K_M.gguf --tokenizer models/x --output models/x-q4

A Megatron checkpoint may have any TP x PP x DP layout. It may also come from another program that writes
Megatron's distributed format (torch_dist), such as Megatron-LM. That needs --no-verify, because it has no
checksums. --reference gives config, tokenizer and chat template.
A GGUF file (pip install 'megatron-fuse[gguf]') is dequantised, to fp32 by default. The tokenizer files and
the chat template are those of --tokenizer, which must have the same tokens as the file.
"""

import argparse

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import path_argument
from megatron_fuse.start import importing
from megatron_fuse.text_safety import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from-megatron",
        type=path_argument,
        help="checkpoint directory (its latest checkpoint is taken), or one iter_XXXXXXX directory in it",
    )
    direction.add_argument(
        "--from-hugging-face", type=path_argument, help="Hugging Face model directory with safetensors"
    )
    direction.add_argument("--from-gguf", type=path_argument, help="GGUF file of a quantised model")
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        help="with --from-gguf: Hugging Face directory of the model that the GGUF file was made from",
    )
    parser.add_argument(
        "--reference",
        type=path_argument,
        help="with --from-megatron: Hugging Face directory of a model of the same architecture",
    )
    parser.add_argument("--output", type=path_argument, required=True)
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="precision of the weights that are written (default: with --from-megatron that of the "
        "reference, with --from-gguf fp32)",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="with --from-megatron: do not compare checksums of the checkpoint's files, or it has none",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.from_megatron and not arguments.reference:
        raise UserError(
            "--from-megatron needs --reference. Name the directory with config.json and tokenizer of the "
            "target."
        )
    if arguments.from_gguf:
        if not arguments.tokenizer:
            raise UserError(
                "--from-gguf needs --tokenizer. Name the Hugging Face directory of the model that the file "
                "was made from."
            )
        with importing():
            from megatron_fuse.huggingface.gguf import convert_gguf
        convert_gguf(arguments.from_gguf, arguments.tokenizer, arguments.output, arguments.dtype or "fp32")
        return
    if arguments.from_megatron:
        with importing():
            from megatron_fuse.training.export import checkpoint_in, export_checkpoint
        dtype = export_checkpoint(
            checkpoint_in(arguments.from_megatron),
            arguments.reference,
            arguments.output,
            arguments.dtype,
            verify=not arguments.no_verify,
        )
    else:
        with importing():
            from megatron_fuse.runtime import start_runtime, stop_runtime
        start_runtime()
        # Megatron-core may only be imported once the runtime has prepared the process for a machine without
        # CUDA.
        from megatron_fuse.training.target import import_hugging_face

        import_hugging_face(arguments.from_hugging_face, arguments.output)
        stop_runtime()
        dtype = "fp32"  # it holds every value of the other dtypes
    say(f"wrote {arguments.output} in {dtype}")
