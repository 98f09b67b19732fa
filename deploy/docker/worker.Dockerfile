# syntax=docker/dockerfile:1
# Worker with torch. From the root of the tree:
#   CPU (x86-64, arm64): docker build -f deploy/docker/worker.Dockerfile -t fedmezo-worker .
#   CUDA: add --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126 -t fedmezo-worker:cuda
# torch's wheels bring CUDA; the host needs the driver and NVIDIA's container toolkit.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY . .
# torch comes first and alone: otherwise pip takes the newest CUDA build for everyone.
RUN python -m venv /opt/fedmezo \
 && /opt/fedmezo/bin/python -m pip install --quiet pip==26.3 \
 && /opt/fedmezo/bin/python -m pip install --quiet \
      ${TORCH_INDEX_URL:+--index-url ${TORCH_INDEX_URL}} "${TORCH}" \
 && /opt/fedmezo/bin/python -m pip install --quiet -c requirements.lock \
      --build-constraint requirements.lock '.[worker,privacy]' \
 && /opt/fedmezo/bin/python -m pip uninstall --quiet --yes pip

FROM ${PYTHON_IMAGE} AS worker
RUN groupadd --gid 65532 fedmezo \
 && useradd --system --key SYS_UID_MAX=65532 --uid 65532 --gid 65532 --no-create-home \
      --home-dir /var/lib/fedmezo fedmezo \
 && install --directory --owner=fedmezo --group=fedmezo --mode=0700 /var/lib/fedmezo
COPY --from=build /opt/fedmezo /opt/fedmezo
ENV PATH=/opt/fedmezo/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_STATE_HOME=/var/lib/fedmezo \
    HF_HOME=/var/lib/fedmezo/huggingface \
    NUMBA_CACHE_DIR=/var/lib/fedmezo/kernels \
    TMPDIR=/var/lib/fedmezo \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    FEDMEZO_WORKER_LOG_FORMAT=json
WORKDIR /var/lib/fedmezo
USER 65532:65532
VOLUME ["/var/lib/fedmezo"]
# A worker listens nowhere, so nothing can be asked; it ends by itself when it cannot go on.
HEALTHCHECK NONE
ENTRYPOINT ["fedmezo-worker"]
