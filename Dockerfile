# Images with the command llavar-peft: `docker build --target cpu -t llavar-peft:cpu .`, or `--target cuda`.
# docs/serving.md says how to serve from them.

FROM python:3.12-slim AS wheel
WORKDIR /sources
COPY setup.py pyproject.toml MANIFEST.in README.md CHANGELOG.md LICENSE ./
COPY adapters adapters
COPY examples/recipes examples/recipes
COPY llavar_peft llavar_peft
RUN pip install --no-cache-dir build && python -m build --outdir /dist

# What both images have: a user without rights, a place for models, and the libraries that OpenCV (of `ocr`) opens.
FROM python:3.12-slim AS base
RUN apt-get update && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 llavar && mkdir /models /work && chown llavar:llavar /models /work
ENV HF_HOME=/models PYTHONUNBUFFERED=1
COPY --from=wheel /dist /dist
WORKDIR /work
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["llavar-peft"]
CMD ["--help"]

FROM base AS cpu
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir "$(echo /dist/*.whl)[serve,ocr,pdf,schema]"
USER llavar

# torch's wheels contain the CUDA libraries; the host needs NVIDIA's driver and container toolkit. gcc is for kernels that
# Triton compiles.
FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "$(echo /dist/*.whl)[serve,ocr,pdf,schema,liger]"
USER llavar
