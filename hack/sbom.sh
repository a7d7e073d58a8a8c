#!/usr/bin/env bash
# Writes a software bill of materials of the operator, CycloneDX as JSON: every crate that is compiled for it, with
# version, licence and checksum.
#     hack/sbom.sh FILE
set -euo pipefail

say() { echo "sbom: $*" >&2; }
die() { say "$*"; exit 1; }

[[ $# -eq 1 ]] || die "usage: $0 FILE"
mkdir -p "$(dirname "$1")"
file=$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tool=$(hack/cargo-tool.sh cargo-cyclonedx)

# The tool writes beside each Cargo.toml, so it works on a copy of what it reads.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
# Whole packages: cargo reads every member of the workspace, and wants the sources that each names.
mapfile -t packages < <(cargo metadata --locked --no-deps --format-version 1 |
  python3 -c 'import json, os, sys
for p in json.load(sys.stdin)["packages"]: print(os.path.relpath(os.path.dirname(p["manifest_path"])))')
for package in "${packages[@]}"; do
  [[ $package == . ]] || cp --parents -r "$package" "$copy"
done
cp --parents -r Cargo.toml Cargo.lock src tests/operator tests/e2e "$copy"
target=$(uname -m)-unknown-linux-musl
"$tool" cyclonedx --quiet --manifest-path "$copy/Cargo.toml" --format json --spec-version 1.5 \
  --target "$target" --override-filename sbom >&2
# The tool also lists crates that a feature mentions without turning them on. cargo tree knows what is compiled, and
# what of that is in the program.
tree() { cargo tree --locked --package gemini-batch-operator --target "$target" --prefix none --format '{p}' --edges "$1"; }
tree normal,build >"$copy/compiled"
tree normal,no-proc-macro >"$copy/inside"

python3 - "$copy" "$file" <<'PYTHON'
import json, sys

copy, out = sys.argv[1:]
text = open(f"{copy}/sbom.json").read().replace(f"path+file://{copy}#", "")
bom = json.loads(text)
compiled, inside = (
    {tuple(line.split()[:2]) for line in open(f"{copy}/{name}") if line.strip()} for name in ("compiled", "inside")
)
bom["components"] = [c for c in bom["components"] if (c["name"], "v" + c["version"]) in compiled]
kept = {c["bom-ref"] for c in bom["components"]} | {bom["metadata"]["component"]["bom-ref"]}
bom["dependencies"] = [
    {**d, "dependsOn": [ref for ref in d.get("dependsOn", []) if ref in kept]} for d in bom["dependencies"] if d["ref"] in kept
]
# Random and of this moment: without them, the same Cargo.lock makes the same list.
bom.pop("serialNumber", None)
bom["metadata"].pop("timestamp", None)

listed = {(c["name"], "v" + c["version"]) for c in bom["components"]}
missing = inside - listed - {(bom["metadata"]["component"]["name"], "v" + bom["metadata"]["component"]["version"])}
if missing or not listed:
    sys.exit(f"sbom: these are in the program and not listed: {sorted(missing)}")
with open(out, "w") as file:
    json.dump(bom, file, indent=1)
    file.write("\n")
print(f"{out}: {len(listed)} crates")
PYTHON
