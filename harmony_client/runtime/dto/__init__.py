"""Records of samples and graders."""

from harmony_client.runtime.dto.AdaptiveGrader import *
from harmony_client.runtime.dto.DatasetSampleFormats import *
from harmony_core.data.samples import AdaptiveDatasetKind as AdaptiveDatasetKind
