# syntax=docker/dockerfile:1.7
# Three images of one source tree; docs/clusters.md says which is for what.
#
#   docker build --target trainer  -t megaopd:trainer .    training nodes with GPUs
#   docker build --target rollouts -t megaopd:rollouts .   SGLang servers, and training beside them
#   docker build --target cpu      -t megaopd:cpu .        tests and quickstart without a GPU
#
# The bases are arguments: give them by digest (image@sha256:...) where builds must repeat exactly.
ARG TRAINER_BASE=nvcr.io/nvidia/pytorch:25.09-py3
ARG ROLLOUTS_BASE=lmsysorg/sglang:v0.5.23-cu129
ARG CPU_BASE=python:3.11.14-slim-bookworm

# --- the project's own packages, in an environment that sees those of the base and changes none -----
FROM ${TRAINER_BASE} AS trainer-env
# The base caps its packages through this file; what is installed here goes beside them.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megaopd
COPY launch/requirements-gpu.txt launch/requirements-gpu-no-deps.txt launch/container.sh launch/
RUN bash launch/container.sh /opt/venv

FROM ${ROLLOUTS_BASE} AS rollouts-env
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megaopd
COPY launch/requirements-gpu.txt launch/requirements-gpu-no-deps.txt launch/container.sh launch/
RUN bash launch/container.sh /opt/venv

# --- training nodes ----------------------------------------------------------------------------------
FROM trainer-env AS trainer
LABEL org.opencontainers.image.title="megaopd trainer" \
      org.opencontainers.image.description="On-policy distillation on Megatron-Core: training" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY . .
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation -e . \
 && useradd --create-home --uid 10001 --user-group megaopd \
 && mkdir -p /shared && chown megaopd:megaopd /shared
ENV PATH=/opt/venv/bin:$PATH SKIP_ENV=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /shared
CMD ["megaopd", "doctor"]

# --- SGLang servers, and training beside them (server.placement = colocated) ---------------------------
FROM rollouts-env AS rollouts
LABEL org.opencontainers.image.title="megaopd rollouts" \
      org.opencontainers.image.description="On-policy distillation on Megatron-Core: SGLang and training" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY . .
# SGLang runs in the base's own environment, with the packages that it was released with.
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation -e . \
 && useradd --create-home --uid 10001 --user-group megaopd \
 && mkdir -p /shared && chown megaopd:megaopd /shared
ENV PATH=/opt/venv/bin:$PATH MEGAOPD_SGLANG_PYTHON=/usr/bin/python3 SKIP_ENV=1 \
    HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /shared
CMD ["megaopd", "doctor"]

# --- tests and quickstart without a GPU ----------------------------------------------------------------
FROM ${CPU_BASE} AS cpu
LABEL org.opencontainers.image.title="megaopd cpu" \
      org.opencontainers.image.description="On-policy distillation on Megatron-Core: tests and quickstart" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The losses' C kernels are compiled where they run; SGLang wants NUMA's library.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev libnuma1 procps \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 --user-group megaopd \
 && mkdir -p /opt/megaopd && chown megaopd:megaopd /opt/megaopd
USER 10001:10001
WORKDIR /opt/megaopd
COPY --chown=megaopd:megaopd pyproject.toml README.md ./
COPY --chown=megaopd:megaopd launch launch
COPY --chown=megaopd:megaopd megaopd megaopd
RUN want=sglang bash launch/env.sh
COPY --chown=megaopd:megaopd . .
ENV PATH=/opt/megaopd/.venv/bin:$PATH
CMD ["bash", "launch/test.sh"]
