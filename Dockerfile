# The command line: docker build --tag moetuner . makes its image, and this reads and writes in the current folder, as you:
# docker run --rm --user "$(id -u)" --volume "$PWD:/work" moetuner advise trace.npz --devices 8 --report page.html
FROM rust:1.90-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /maturin \
    && /maturin/bin/pip install --no-cache-dir 'maturin>=1.16,<2'
WORKDIR /source
COPY . .
RUN /maturin/bin/maturin build --release --out /wheels

FROM python:3.13-slim-bookworm
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN wheel=$(echo /wheels/*.whl) \
    && pip install --no-cache-dir "${wheel}[parquet,report]" \
    && rm -rf /wheels \
    && useradd --create-home --uid 1000 moetuner \
    && moetuner --self-test
USER 1000
WORKDIR /work
ENTRYPOINT ["moetuner"]
CMD ["--help"]
