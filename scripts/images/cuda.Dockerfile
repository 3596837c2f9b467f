# ple_jax for NVIDIA's GPUs. CUDA's libraries come with JAX's wheels; the driver is the host's.
#
#   docker build -f scripts/images/cuda.Dockerfile -t ple_jax:cuda .
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/runs" ple_jax:cuda \
#       --config hh --workdir /runs/hh --config.model.path=meta-llama/Meta-Llama-3-8B-Instruct
FROM python:3.12.12-slim-bookworm

# what NVIDIA's container runtime shows the container
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONUNBUFFERED=1

COPY . /opt/ple_jax
RUN pip install --no-cache-dir '/opt/ple_jax[cuda,data,eval]'

# as process 1 it gets a scheduler's SIGTERM itself
ENTRYPOINT ["ple_jax"]
