"""The verbs of the command line: one dataclass each, whose fields are its options and which calls one public function.

Nothing heavy is imported before a verb runs, so that help is instant.
"""

from enfilade.verbs_complete import Complete
from enfilade.verbs_data import (
    DataCheck,
    DataHHA,
    DataPrepare,
    DataRegions,
    DataRender,
    DataShow,
    DataVoxels,
    DataWeights,
)
from enfilade.verbs_finetune import Finetune
from enfilade.verbs_model import Combine, Export, Info
from enfilade.verbs_predict import Demo, Predict, Refine
from enfilade.verbs_serve import Serve
from enfilade.verbs_train import Evaluate, Reproduce, Train

Verb = (
    Predict
    | Train
    | Finetune
    | Evaluate
    | Reproduce
    | DataPrepare
    | DataHHA
    | DataCheck
    | DataShow
    | DataWeights
    | DataRegions
    | DataRender
    | DataVoxels
    | Combine
    | Export
    | Refine
    | Complete
    | Serve
    | Demo
    | Info
)

VERBS: dict[str, type[Verb]] = {
    "predict": Predict,
    "train": Train,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "reproduce": Reproduce,
    "data prepare": DataPrepare,
    "data hha": DataHHA,
    "data check": DataCheck,
    "data show": DataShow,
    "data weights": DataWeights,
    "data regions": DataRegions,
    "data render": DataRender,
    "data voxels": DataVoxels,
    "combine": Combine,
    "export": Export,
    "refine": Refine,
    "complete": Complete,
    "serve": Serve,
    "demo": Demo,
    "info": Info,
}
