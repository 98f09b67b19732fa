# syntax=docker/dockerfile:1
# Worker for a Jetson with JetPack 6, whose GPU the wheels on PyPI do not know: torch comes with
# NVIDIA's image for integrated GPUs. On the device, from the root of the tree:
#   docker build -f deploy/docker/worker-jetson.Dockerfile -t fedmezo-worker:jetson .
#   docker run --runtime nvidia ...
# With JetPack 7, worker.Dockerfile does: torch's own wheels for arm64 have CUDA 13.
ARG JETSON_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3-igpu

FROM ${JETSON_IMAGE} AS worker
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY . .
# The image's torch stays: whatever pip would put in its place has no kernels for this GPU.
RUN python -m pip freeze > /tmp/all.txt \
 && sed -E '/^(torch|triton|numpy)([ =]|$)/!d' /tmp/all.txt > /tmp/kept.txt \
 && sed -E '/^(torch|triton|numpy|nvidia-.*)==/d' requirements.lock > /tmp/pins.txt \
 && python -m venv --system-site-packages /opt/fedmezo \
 && /opt/fedmezo/bin/python -m pip install --quiet -c /tmp/pins.txt -c /tmp/kept.txt \
      '.[worker,privacy]' \
 && groupadd --gid 65532 fedmezo \
 && useradd --system --key SYS_UID_MAX=65532 --uid 65532 --gid 65532 --no-create-home \
      --home-dir /var/lib/fedmezo fedmezo \
 && install --directory --owner=fedmezo --group=fedmezo --mode=0700 /var/lib/fedmezo
ENV PATH=/opt/fedmezo/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_STATE_HOME=/var/lib/fedmezo \
    HF_HOME=/var/lib/fedmezo/huggingface \
    NUMBA_CACHE_DIR=/var/lib/fedmezo/kernels \
    TMPDIR=/var/lib/fedmezo \
    FEDMEZO_WORKER_LOG_FORMAT=json
WORKDIR /var/lib/fedmezo
USER 65532:65532
VOLUME ["/var/lib/fedmezo"]
HEALTHCHECK NONE
ENTRYPOINT ["fedmezo-worker"]
