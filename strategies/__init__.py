"""One file, one published algorithm. `fedlora run strategy=NAME` takes the names in lower case."""

if __name__ != "fedlora.strategies":
    raise ModuleNotFoundError(
        "import fedlora.strategies, not strategies: this folder is installed inside the fedlora package"
    )

from .federa import FeDeRA
from .fedexlora import FedExLoRA
from .fedfold import FedFold
from .fedit import FedIT
from .fedms import FedMS
from .fedrotlora import FedRotLoRA
from .fedsalora import FedSALoRA
from .fedsvd import FedSVD
from .ffalora import FFALoRA
from .flexlora import FlexLoRA
from .flora import FLoRA
from .hetlora import HetLoRA
from .pfedlora import PFedLoRA
from .privatelora import PrivateLoRA
from .raflora import RaFLoRA
from .rolora import RoLoRA
from .slora import SLoRA

__all__ = [
    "FFALoRA",
    "FLoRA",
    "FeDeRA",
    "FedExLoRA",
    "FedFold",
    "FedIT",
    "FedMS",
    "FedRotLoRA",
    "FedSALoRA",
    "FedSVD",
    "FlexLoRA",
    "HetLoRA",
    "PFedLoRA",
    "PrivateLoRA",
    "RaFLoRA",
    "RoLoRA",
    "SLoRA",
]
