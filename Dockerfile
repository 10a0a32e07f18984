# lowprec with Debian's Fashion-MNIST: `docker run IMAGE` does the default run, `docker run IMAGE python train.py ...` another.
FROM debian:bookworm-slim

# gcc, libc6-dev and python3-dev: Triton builds the GPU's kernels with them; the CPU's are built with the first two.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates dataset-fashion-mnist gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home lowprec \
    && install -d -o lowprec -g lowprec /app

USER lowprec
WORKDIR /app
ENV PATH=/home/lowprec/venv/bin:$PATH

# What the project needs changes less often than its code: a layer of its own.
COPY --chown=lowprec pyproject.toml README.md ./
RUN mkdir lowprec && touch lowprec/__init__.py \
    && python3 -m venv /home/lowprec/venv \
    && pip install --no-cache-dir -e .

COPY --chown=lowprec . .

# Made here, so that the volume belongs to the user and not to root.
RUN mkdir runs
VOLUME /app/runs
CMD ["python", "train.py"]
