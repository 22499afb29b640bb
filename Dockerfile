# Gorgon on a CUDA host. Without a GPU the same image serves on the CPU.
#
#   docker build -t gorgon .
#   docker run --gpus all -p 8000:8000 -v gorgon:/models gorgon [MODEL] [FLAGS]

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/gorgon/bin:$PATH

# gcc compiles the CPU kernels for the processor they run on, into the volume; Triton's launchers take Python's
# headers too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/gorgon \
    && useradd --create-home --uid 10001 gorgon \
    && install --directory --owner=gorgon --group=gorgon /models

# On PyPI the wheel of torch for Linux is the CUDA build. It has a layer of its own: it is large and rarely changes.
RUN pip install torch==2.13.0

WORKDIR /src
COPY . .
RUN pip install .

# Models and hub downloads live in the volume, so that a new container finds them.
ENV GORGON_HOME=/models \
    HF_HOME=/models/huggingface \
    GORGON_HOST=0.0.0.0
VOLUME /models
WORKDIR /home/gorgon
USER gorgon
EXPOSE 8000

# /health answers 200 only while the engine makes progress; the first start also fetches the model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('GORGON_PORT', '8000') + '/health', timeout=4)"]

# Not through a shell: SIGTERM has to reach the server, which then finishes what runs.
STOPSIGNAL SIGTERM
ENTRYPOINT ["gorgon", "serve"]
