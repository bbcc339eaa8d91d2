"""All mutants, in one table: add a fault to the file of its kind."""

from tests.mutants.family_faults import FAMILIES
from tests.mutants.layout_faults import LAYOUTS
from tests.mutants.llama_faults import LLAMA
from tests.mutants.mutant import Mutant
from tests.mutants.precision_faults import PRECISIONS
from tests.mutants.runner_faults import RUNNER_MUTANTS
from tests.mutants.vision_faults import VISION_MUTANTS
from tests.mutants.weight_faults import WEIGHT_MUTANTS

MUTANTS: tuple[Mutant, ...] = (
    *LLAMA,
    *PRECISIONS,
    *LAYOUTS,
    *FAMILIES,
    *VISION_MUTANTS,
    *WEIGHT_MUTANTS,
    *RUNNER_MUTANTS,
)
