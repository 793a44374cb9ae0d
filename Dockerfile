# An image to train in. NVIDIA's PyTorch images bring torch, Transformer Engine, apex and Triton built for each other, and a pip
# constraint that keeps them. Take a release with Python 3.11 or newer and a Transformer Engine that docs/install.md names.
#
#     docker build --build-arg PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:RELEASE -t megatron-fuse .
ARG PYTORCH_IMAGE
FROM ${PYTORCH_IMAGE}
WORKDIR /opt/megatron-fuse
COPY docker/requirements.txt docker/requirements.txt
RUN pip install --no-cache-dir -r docker/requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
ENTRYPOINT ["torchrun"]
