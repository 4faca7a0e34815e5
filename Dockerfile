# NOT BUILT YET, never run on a GPU node.
# A node with an NVIDIA driver 580 or newer and the NVIDIA Container Toolkit; CUDA 13's libraries come with torch's and DALI's wheels.
#   docker build --tag lavit .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" --workdir /work lavit \
#       deepspeed pretrain/main.py --recipe recipes/demo.yaml
FROM ubuntu:24.04

# A compiler and Python's headers are for model.compile (torch.compile and Triton).
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential ca-certificates git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . /opt/lavit
WORKDIR /opt/lavit
RUN make setup
ENV PATH=/opt/lavit/.venv/bin:$PATH
CMD ["python", "pretrain/main.py", "--help"]
