# The images of the operator (the default) and of the simulator (--target simulator), for those who have docker or
# buildah:
#     docker build -t gemini-batch-operator:0.1.0 .
#     docker build -t gemini-simulator:0.1.0 --target simulator .
#     docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/gemini-batch-operator:0.1.0 --push .
# 0.1.0 is the chart's appVersion, and so the tag that it asks for.
# --build-arg VERSION=... and REVISION=... go into the labels. Each platform builds on itself (or emulated): no cross
# compilers. 'make image' makes the same for this machine's platform, without docker.
ARG RUST=docker.io/library/rust:1.95-slim-bookworm
FROM ${RUST} AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates musl-tools
WORKDIR /src
COPY . .
# uname -m is Rust's word for TARGETARCH.
RUN target="$(uname -m)-unknown-linux-musl" \
 && rustup target add "$target" \
 && cargo build --release --locked --target "$target" -p gemini-batch-operator -p gemini-simulator \
 && mkdir /out \
 && mv "target/$target/release/gemini-batch-operator" "target/$target/release/gemini-simulator" /out/ \
 && cat /usr/share/ca-certificates/mozilla/*.crt > /out/ca-certificates.crt

FROM scratch AS simulator
ARG VERSION=unknown
ARG REVISION=unknown
COPY --from=build /out/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/gemini-simulator /gemini-simulator
# A number, so that a cluster can see that it is not root.
USER 65532:65532
ENTRYPOINT ["/gemini-simulator"]
LABEL org.opencontainers.image.title="gemini-simulator" \
      org.opencontainers.image.description="The Gemini batch API as far as it is known, for tests and demos" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM scratch
ARG VERSION=unknown
ARG REVISION=unknown
COPY --from=build /out/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/gemini-batch-operator /gemini-batch-operator
USER 65532:65532
ENTRYPOINT ["/gemini-batch-operator"]
LABEL org.opencontainers.image.title="gemini-batch-operator" \
      org.opencontainers.image.description="Gemini batch jobs as Kubernetes resources" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
