# ple_jax for Ascend 910B: CANN is of the base image, the driver and its devices are the host's (docs/ascend.md has the flags of
# docker run). Other chips: the tag's 910b.
#
#   docker build -f scripts/images/ascend.Dockerfile -t ple_jax:ascend .
#   docker run --rm ... -v "$PWD/runs:/runs" ple_jax:ascend \
#       --config hh --workdir /runs/hh --config.model.path=meta-llama/Meta-Llama-3-8B-Instruct --config.mesh.data=8
FROM quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.12

# an index with torch's CPU builds: elsewhere the one for x86 brings gigabytes of CUDA, which nothing here needs
ARG TORCH_INDEX=
ENV PYTHONUNBUFFERED=1

COPY . /opt/ple_jax
# torch first: what comes after finds it there. Not the extra `ascend`, whose torch is newer than what this CANN belongs to
# hadolint ignore=DL3013  # takes the index for a package without a version
RUN python3 -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.12.0 \
    && python3 -m pip install --no-cache-dir torch-npu==2.12.0 '/opt/ple_jax[data,eval]'

# sources CANN's set_env.sh and starts a process for each of 8 NPUs (NPROC_PER_NODE; NNODES for several machines)
ENTRYPOINT ["/opt/ple_jax/scripts/launch/ascend.sh"]
