# syntax=docker/dockerfile:1
# Coordinator and relay. From the root of the tree:
#   docker build -f deploy/docker/coordinator.Dockerfile --target coordinator -t fedmezo-coordinator .
# Target `coordinator` has no torch: it serves runs that have begun, and relays. Target
# `coordinator-replica` has torch's CPU build too: it begins runs, evaluates and takes snapshots.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY . .
RUN python -m venv /opt/fedmezo \
 && /opt/fedmezo/bin/python -m pip install --quiet pip==26.3 \
 && /opt/fedmezo/bin/python -m pip install --quiet -c requirements.lock \
      --build-constraint requirements.lock '.[page,postgres]' \
 && /opt/fedmezo/bin/python -m pip uninstall --quiet --yes pip

FROM ${PYTHON_IMAGE} AS build-replica
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY . .
# torch comes first and alone: otherwise pip takes the newest CUDA build.
RUN python -m venv /opt/fedmezo \
 && /opt/fedmezo/bin/python -m pip install --quiet pip==26.3 \
 && /opt/fedmezo/bin/python -m pip install --quiet \
      ${TORCH_INDEX_URL:+--index-url ${TORCH_INDEX_URL}} "${TORCH}" \
 && /opt/fedmezo/bin/python -m pip install --quiet -c requirements.lock \
      --build-constraint requirements.lock '.[worker,page,postgres]' \
 && /opt/fedmezo/bin/python -m pip uninstall --quiet --yes pip

FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 65532 fedmezo \
 && useradd --system --key SYS_UID_MAX=65532 --uid 65532 --gid 65532 --no-create-home \
      --home-dir /var/lib/fedmezo fedmezo \
 && install --directory --owner=fedmezo --group=fedmezo --mode=0700 /var/lib/fedmezo
ENV PATH=/opt/fedmezo/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_STATE_HOME=/var/lib/fedmezo \
    HF_HOME=/var/lib/fedmezo/huggingface \
    NUMBA_CACHE_DIR=/var/lib/fedmezo/kernels \
    TMPDIR=/var/lib/fedmezo \
    FEDMEZO_COORDINATOR_LISTEN=0.0.0.0:7465 \
    FEDMEZO_COORDINATOR_HEALTH_LISTEN=0.0.0.0:7468 \
    FEDMEZO_COORDINATOR_LOG_FORMAT=json \
    FEDMEZO_RELAY_LISTEN=0.0.0.0:7465 \
    FEDMEZO_RELAY_HEALTH_LISTEN=0.0.0.0:7468 \
    FEDMEZO_RELAY_LOG_FORMAT=json
WORKDIR /var/lib/fedmezo
USER 65532:65532
VOLUME ["/var/lib/fedmezo"]
EXPOSE 7465 7466 7468
HEALTHCHECK --interval=30s --timeout=30s --start-period=10m \
  CMD ["fedmezo", "health", "--coordinator", "127.0.0.1:7468"]
ENTRYPOINT ["fedmezo-coordinator"]

FROM runtime AS coordinator-replica
COPY --from=build-replica /opt/fedmezo /opt/fedmezo

FROM runtime AS coordinator
COPY --from=build /opt/fedmezo /opt/fedmezo
