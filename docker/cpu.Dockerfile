# efficient_dl on CPUs, built from the clone's root: docker build -f docker/cpu.Dockerfile -t efficient-dl:cpu .
# docs/containers.md says more. cuda.Dockerfile has the same stages: tests/unit/test_dockerfiles.py compares them.
#
# Any image with Python >= 3.11 and glibc will do. A tag can be moved, a digest cannot; to pin one, take it from
# `docker buildx imagetools inspect NAME:TAG` and give --build-arg BASE=NAME:TAG@sha256:DIGEST.
ARG BASE=docker.io/library/python:3.11.13-slim-bookworm

# ---- base: what the two other stages share
FROM ${BASE} AS base

# ---- build: a folder with the wheels of efficient_dl and of all that it needs, as pinned in constraints.txt
FROM base AS build
# Debian removes old versions from its archive: pinned ones would soon not be there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE ./
COPY docker/wheelhouse.sh docker/
COPY efficient_dl efficient_dl
ARG EXTRAS=bytes,data
# pip's own variables. Here is where PyTorch's CPU builds are; with PIP_NO_INDEX=1 and a folder as PIP_FIND_LINKS
# nothing is downloaded.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
RUN --mount=type=cache,target=/root/.cache/pip \
    bash docker/wheelhouse.sh /wheelhouse "$EXTRAS"

# ---- runtime: nothing but those wheels, installed without an index; no compiler, no sources
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
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m --retries=3 CMD ["edl-health"]
ENTRYPOINT ["edl"]
CMD ["--help"]
