# The README's own installation on a CUDA base with a compiler (Triton builds its launcher with it).
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc make git ca-certificates \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/harmony-core
COPY . .
# On a GPU machine the newest torch that we support is wanted, with its CUDA libraries: not the lock, which names the CPU build.
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir ".[gguf]" \
 && rm -rf build *.egg-info

# Any uid may run it: the home, the caches and the working directory are writable by all, and HOME is one of them.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/workspace \
    ADAPTIVE_HOME=/adaptive \
    TRITON_CACHE_DIR=/workspace/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/workspace/.cache/inductor
RUN mkdir -p /adaptive /workspace && chmod 0777 /adaptive /workspace
VOLUME /adaptive
# Not the checkout: there, the source folder would shadow the installed package.
WORKDIR /workspace
ENTRYPOINT ["adaptive"]
CMD ["--help"]
