"""Artifacts as other servers want them: what `export-llm package` can write."""

from exporter.packaging import triton
from exporter.packaging.request import Packager

FORMATS: dict[str, Packager] = {
    "triton": triton.package,
}
