# efficient_dl on NVIDIA GPUs, built from the clone's root: docker build -f docker/cuda.Dockerfile -t efficient-dl:cuda .
# docs/containers.md says more. cpu.Dockerfile has the same stages: tests/unit/test_dockerfiles.py compares them.
# This one has been linted, but never been built: its base could not be had where the project is developed.
#
# CUDA's libraries come with torch's wheels: the base brings what the NVIDIA container toolkit reads, and Ubuntu. A tag
# can be moved, a digest cannot; to pin one, take it from `docker buildx imagetools inspect NAME:TAG` and give
# --build-arg BASE=NAME:TAG@sha256:DIGEST. torch 2.13 is built for CUDA 13, which needs a driver >= 580.
ARG BASE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04

# ---- base: what the two other stages share
FROM ${BASE} AS base
# A C compiler and Python's headers stay in the image: Triton compiles what starts its kernels on the machine itself.
# Ubuntu removes old versions from its archive: pinned ones would soon not be there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# ---- build: a folder with the wheels of efficient_dl and of all that it needs, as pinned in constraints.txt
FROM base AS build
# Ubuntu removes old versions from its archive: pinned ones would soon not be there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE ./
COPY docker/wheelhouse.sh docker/
COPY efficient_dl efficient_dl
ARG EXTRAS=bytes,data
# pip's own variables: torch with CUDA is on PyPI; with PIP_NO_INDEX=1 and a folder as PIP_FIND_LINKS nothing is
# downloaded.
ARG PIP_EXTRA_INDEX_URL
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
RUN --mount=type=cache,target=/root/.cache/pip \
    bash docker/wheelhouse.sh /wheelhouse "$EXTRAS"

# ---- runtime: nothing but those wheels, installed without an index; no sources
FROM base AS runtime
ARG EXTRAS=bytes,data
RUN --mount=type=bind,from=build,source=/wheelhouse,target=/wheelhouse \
    python3 -m venv /opt/edl \
    && /opt/edl/bin/python -m pip install --no-cache-dir --no-index --find-links /wheelhouse "efficient_dl[$EXTRAS]"
COPY --chmod=0755 docker/health.py /opt/edl/bin/edl-health
# Whoever --user names, or a cluster maps in, may write where runs and caches go. A volume at /work/runs starts as open.
RUN useradd --no-log-init --uid 10001 --create-home edl \
    && mkdir -p /work/runs \
    && chmod 1777 /home/edl /work /work/runs

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="efficient_dl" \
      org.opencontainers.image.description="Distributed training in torch with entropy-coded gradients" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Caches follow HOME. USER names folders of caches for users that /etc/passwd does not know. How many threads a worker
# has is not for an image to say: OMP_NUM_THREADS stays unset.
ENV PATH=/opt/edl/bin:$PATH \
    HOME=/home/edl \
    USER=edl \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /work
# Importing torch takes seconds of one core: seldom, therefore. --no-healthcheck leaves it out.
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m --retries=3 CMD ["edl-health", "--gpu"]
ENTRYPOINT ["edl"]
CMD ["--help"]
