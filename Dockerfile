# `one4d` with all that training and generating need: docs/install.md. apptainer.def has the same steps.
# The base has a CUDA runtime and the settings by which a container sees GPUs; torch's wheel brings the rest of CUDA.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE}

# g++ and Python's headers stay: train.compile builds with them while it runs. The versions are the distribution's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/one4d/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# a pip index for torch alone, where the driver is older than the CUDA of PyPI's torch
ARG TORCH_INDEX=
RUN python3 -m venv /opt/one4d \
    && pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
# what .dockerignore lets through: what the wheel is made of
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[app,st-lpips]'

# the home is anyone's, so that `docker run --user` may name whoever owns the mounted folder
RUN useradd --uid 10001 --create-home one4d \
    && chmod 1777 /home/one4d
ENV HOME=/home/one4d LOGNAME=one4d
USER 10001
WORKDIR /work
ENTRYPOINT ["one4d"]
CMD ["--help"]
