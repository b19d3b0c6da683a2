# syntax=docker/dockerfile:1
# Megatron-LM at a tag, with ScaleMoE and its native kernels, on NVIDIA's PyTorch. docs/container.md says how, and what was tried.
#
#   docker build -t megatron-scalemoe --build-arg TORCH_CUDA_ARCH_LIST=9.0 .
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Or core_v0.19.0: the tags that patches/megatron has patches for.
ARG MEGATRON_TAG=core_v0.16.1
ARG MEGATRON_LM_URL=https://github.com/NVIDIA/Megatron-LM.git
# The wheel has the data sets' helpers compiled, and tells us the version; the scripts come from the checkout.
RUN git -c advice.detachedHead=false clone --depth 1 --branch "${MEGATRON_TAG}" "${MEGATRON_LM_URL}" /opt/Megatron-LM \
    && pip install --no-cache-dir --no-deps "megatron-core==${MEGATRON_TAG#core_v}"

WORKDIR /opt/megatron-scalemoe
COPY patches patches
COPY tools/apply_patches.sh tools/apply_patches.sh
RUN bash tools/apply_patches.sh --check /opt/Megatron-LM && bash tools/apply_patches.sh /opt/Megatron-LM

# The architectures decide, not a GPU of the machine that builds: there need not be one.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0+PTX"
COPY . .
# The base image's constraints hold back the setuptools that builds the package. Its torch and numpy must stay. Latent attention and Mamba
# layers import einops.
# hadolint ignore=DL3013
RUN torch_before="$(python -c 'import torch; print(torch.__version__)')" \
    && PIP_CONSTRAINT="" SCALEMOE_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
        pip install --no-cache-dir ".[train,report,megatron-lm]" einops \
    && test "$(python -c 'import torch; print(torch.__version__)')" = "${torch_before}" \
    && useradd --create-home --uid 10001 scalemoe

USER 10001
WORKDIR /home/scalemoe
ENV MEGATRON_LM_PATH=/opt/Megatron-LM
RUN scalemoe doctor
CMD ["scalemoe", "doctor"]
