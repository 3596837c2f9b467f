# ple_jax for Cloud TPUs (on a TPU VM, or by GKE), with the TPU's runtime and compiler, libtpu.
#
#   docker build -f scripts/images/tpu.Dockerfile -t ple_jax:tpu .
#   docker run --rm --privileged --net=host -v "$PWD/runs:/runs" ple_jax:tpu \
#       --config hh --workdir /runs/hh --config.model.path=meta-llama/Meta-Llama-3-8B-Instruct
FROM python:3.12.12-slim-bookworm

ENV PYTHONUNBUFFERED=1

COPY . /opt/ple_jax
RUN pip install --no-cache-dir '/opt/ple_jax[tpu,data,eval]'

# as process 1 it gets a scheduler's SIGTERM itself
ENTRYPOINT ["ple_jax"]
