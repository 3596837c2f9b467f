# ple_jax for Cloud TPUs, with the TPU's runtime and compiler, libtpu.
#
#   docker build -f scripts/images/tpu.Dockerfile -t REGION-docker.pkg.dev/PROJECT/ple/tpu:0.1 .
#   docker run --rm --privileged --net=host -v "$PWD/runs:/runs" ple_jax:tpu --config hh --workdir /runs/hh     (on a TPU VM)
FROM python:3.12.12-slim-bookworm

ENV PYTHONUNBUFFERED=1

COPY . /opt/ple_jax
RUN pip install --no-cache-dir '/opt/ple_jax[tpu,data,eval]'

# as process 1 it gets a scheduler's SIGTERM itself
ENTRYPOINT ["ple_jax"]
