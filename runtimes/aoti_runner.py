"""The AOTInductor runner: packages that `--target torch` compiled, one for prefill and one for decode steps."""

from pathlib import Path
from typing import Any

from runtimes.artifact import Artifact, engine_key
from runtimes.errors import ArtifactError, RuntimeMissingError
from runtimes.signature import CacheSpec, GraphSignature, VisionPart
from runtimes.torch_package import MODEL_NAME, Place, check_machine, load_constants, read_facts
from runtimes.torch_runner import TorchRunner, import_torch

TARGET = "torch"


class AOTIRunner(TorchRunner):
    """Runs a decoder's packages, which update the cache in place; see runtimes.runner.Runner for the interface."""

    def __init__(
        self,
        prefill: Path,
        decode: Path,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        vision: VisionPart | None = None,
        device: str | None = None,
    ) -> None:
        """Load the packages. The vision encoder's is loaded when the first images come.

        Args:
            decode: the package for one token of each row.
            vision: what makes the decoder see, if it can, with the path of its package.
            device: "cpu" or "cuda", where it matters that the packages were made for that; by default it does not.

        Raises:
            RuntimeMissingError: PyTorch is not installed, or a GPU is needed.
            EngineLoadError: the packages were made by another PyTorch, or for another machine.
            ArtifactError: a file is missing or damaged.
        """
        import_torch()
        self._folder = prefill.parent  # where the weights lie as well
        self._loaded: dict[Place, Any] = {}  # the weights, which all packages share
        self._constants: list[dict[str, Any]] = []  # of each package, which reads them where they lie
        made_for = read_facts(prefill)[0].device
        if device not in (None, made_for):
            raise RuntimeMissingError(
                f"these packages were compiled for {made_for}, not for {device}: leave --device out, or export again"
                " with --target torch on a machine that has it"
            )
        super().__init__(signature, cache_spec, vision=vision, device=made_for, what="AOTInductor of PyTorch")
        self._prefill, self._decode = self._load(prefill), self._load(decode)
        self._encoder: Any = None

    @classmethod
    def open(cls, artifact: Artifact, **options: Any) -> "AOTIRunner":
        """Run the artifact's packages."""
        entry = artifact.engine(TARGET, "packages for PyTorch")
        if entry.decode_file is None:
            raise ArtifactError(f"{artifact.folder} holds no decode package: export again with --target {TARGET}")
        vision = artifact.vision_part(artifact.manifest.engines.get(engine_key(TARGET, "vision_encoder")))
        paths = artifact.path(entry.file), artifact.path(entry.decode_file)
        signature = artifact.manifest.graphs[entry.graph].signature
        return cls(*paths, signature, artifact.manifest.cache, vision=vision, **options)

    def _load(self, path: Path) -> Any:
        """The package's loader, with its constants."""
        facts, metadata = read_facts(path)
        check_machine(path, facts, metadata)
        constants = load_constants(self._folder, facts, self.device, self._loaded)
        # torch._inductor.aoti_load_package takes no file whose name does not end in .pt2, as before it is published.
        loader = self._torch._C._aoti.AOTIModelPackageLoader(str(path), MODEL_NAME, False, 1, -1)
        needed = {name: constants[name] for name in loader.get_constant_fqns()}
        self._constants.append(needed)
        use_inactive, check_full_update, user_managed = False, True, True
        loader.load_constants(needed, use_inactive, check_full_update, user_managed)
        return loader

    def _run(self, inputs: list[Any], sizes: dict[str, int]) -> Any:
        one_token = sizes["sequence_length"] == sizes["n"] == 1
        loader = self._decode if one_token else self._prefill
        (logits,) = loader.run([*inputs, *self._cache, *self._images])
        return logits

    def _encode(self, inputs: list[Any]) -> list[Any]:
        if self._encoder is None:
            assert self._vision is not None
            self._encoder = self._load(self._vision.path)
        images: list[Any] = self._encoder.run(inputs)
        return images

    def _release(self) -> None:
        self._prefill = self._decode = self._encoder = None
        self._loaded, self._constants = {}, []
