"""MDM: one diffusion model over one latent space that generates images, text, or both at once."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it without torchvision
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_mdm import MDMConfig, MDMVAEConfig
from .generation_configuration_mdm import MDMGenerationConfig
from .generation_mdm import MDMGenerateOutput
from .image_processing_mdm import MDMImageProcessorPil
from .modeling_mdm import MDMForMultiModalGeneration, MDMModel, MDMModelOutput, MDMOutput
from .modeling_mdm_vae import MDMVAEModel
from .pipeline_mdm import TASK, MDMPipeline
from .processing_mdm import MDMProcessor
from .scoring_mdm import MDMScoreOutput


__version__ = "0.1.0"

__all__ = [
    "MDMConfig",
    "MDMForMultiModalGeneration",
    "MDMGenerateOutput",
    "MDMGenerationConfig",
    "MDMImageProcessorPil",
    "MDMModel",
    "MDMModelOutput",
    "MDMOutput",
    "MDMPipeline",
    "MDMProcessor",
    "MDMScoreOutput",
    "MDMVAEConfig",
    "MDMVAEModel",
]

AutoConfig.register("mdm", MDMConfig)
AutoConfig.register("mdm_vae", MDMVAEConfig)
AutoModel.register(MDMConfig, MDMForMultiModalGeneration)
AutoModel.register(MDMVAEConfig, MDMVAEModel)
AutoModelForMultimodalLM.register(MDMConfig, MDMForMultiModalGeneration)
AutoModelForImageTextToText.register(MDMConfig, MDMForMultiModalGeneration)
AutoImageProcessor.register(MDMConfig, image_processor_classes={"pil": MDMImageProcessorPil})
AutoProcessor.register(MDMConfig, MDMProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, MDMPipeline, pt_model=AutoModel, type="multimodal")

# Their code travels with whatever is saved or pushed, so that it loads where this package is not installed.
MDMConfig.register_for_auto_class()
MDMVAEConfig.register_for_auto_class()
MDMForMultiModalGeneration.register_for_auto_class("AutoModel")
MDMModel.register_for_auto_class("AutoModel")
MDMVAEModel.register_for_auto_class("AutoModel")
MDMImageProcessorPil.register_for_auto_class("AutoImageProcessor")
MDMProcessor.register_for_auto_class("AutoProcessor")
