"""MDM under transformers' own ModelTesterMixin, ConfigTester, ProcessorTesterMixin and ImageProcessingTestMixin."""

import unittest
from pathlib import Path
from unittest import mock

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_processing_common import MODALITY_TEST_SPECS, ProcessorTesterMixin
from tiny import batch, fixed_noise, tiny_config
from transformers import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils.import_utils import DummyObject

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMImageProcessorPil, MDMModel, MDMProcessor


CARD = Path(__file__).parents[2] / "model_cards" / "mdm-digits"
MODEL_MAPPING_NAMES["mdm"] = "MDMModel"
# The mixin's own factor of -1 makes pixels outside [-1, 1], which are refused; this one makes every pixel dark.
MODALITY_TEST_SPECS["images"]["init_time_kwargs"] = {"do_rescale": True, "rescale_factor": 1e-3}


class MDMModelTester:
    """A tiny config and inputs, by the names that the mixin asks for."""

    batch_size, num_hidden_layers, hidden_size, is_training = 2, 2, 32, True

    def __init__(self):
        self.seq_length = self.prepare_config_and_inputs_for_common()[1]["input_ids"].shape[1]

    def get_config(self):
        return tiny_config(num_hidden_layers=self.num_hidden_layers, hidden_size=self.hidden_size)

    def prepare_config_and_inputs_for_common(self):
        inputs = batch(["both", "both"], is_training=True)
        inputs = {name: value for name, value in inputs.items() if name not in ("class_ids", "labels")}
        return self.get_config(), inputs | {"timesteps": torch.full((2, 2), 0.5), "noise": fixed_noise(inputs)}


class MDMModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MDMModel, MDMForMultiModalGeneration)
    all_generative_model_classes = ()  # `generate` is a diffusion sampler, not the token-by-token one
    has_attentions = False  # there is none

    def setUp(self):
        self.model_tester = MDMModelTester()
        self.config_tester = ConfigTester(self, config_class=MDMConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels and model_class is MDMForMultiModalGeneration:
            inputs["labels"] = batch(["both", "both"], is_training=True)["labels"]
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


def left_out(tests: dict[str, tuple[str, ...]]) -> dict:
    """Reason -> names of tests, as members of a test class that skip them."""
    return {name: unittest.skip(reason)(lambda self: None) for reason, names in tests.items() for name in names}


class MDMImageProcessingTester(ImageProcessingTester):
    """What transformers 5.17 and 5.23 alike ask for; the inherited `__init__` is not the same in both."""

    batch_size, num_channels, min_resolution, max_resolution = 7, 3, 30, 400
    size, patch_size = {"height": 16, "width": 24}, 4
    image_processing_classes = {"pil": MDMImageProcessorPil}

    def __init__(self):
        pass

    def prepare_image_processor_dict(self):
        return {"size": self.size, "patch_size": self.patch_size}


class MDMImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = MDMImageProcessingTester.image_processing_classes
    image_processor_tester = MDMImageProcessingTester()
    image_processor_dict = image_processor_tester.prepare_image_processor_dict()

    def setUp(self):
        pass  # the mixin's own looks for the classes among those of transformers

    @unittest.skipIf(isinstance(AutoImageProcessor, DummyObject), "transformers 5.17 hides it without torchvision")
    def test_image_processor_save_load_with_autoimageprocessor(self):
        super().test_image_processor_save_load_with_autoimageprocessor()

    locals().update(
        left_out(
            {
                "arrays of another number of channels are refused, not guessed at": ("test_call_numpy_4_channels",),
                "there is no torchvision backend: nothing here depends on torchvision": (
                    "test_new_models_require_torchvision_backend",
                ),
            }
        )
    )


class MDMProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MDMProcessor
    model_id = str(CARD)
    images_unstructured_max_length = 90  # a row holds what is to be made, too
    locals().update(
        left_out(
            {
                "beside a text a row holds control tokens and what to make, beside known images those to make": (
                    "test_subprocessor_defaults_0_text",
                    "test_subprocessor_defaults_1_images",
                ),
                "every condition may be absent, all of them too": ("test_processor_with_multiple_inputs",),
                "another number of texts than of images is refused, in words of our own": (
                    "test_if_input_has_mismatching_tokens_and_mm_data",
                ),
                "an image becomes tokens, not text, so no text has offsets of it": ("test_replacement_offsets",),
                "a call may override the canvas that the processor was saved with": (
                    "test_call_arguments_not_in_attributes",
                ),
                "a conversation becomes a row with its target mask: no ids of its text alone, no other mask": (
                    "test_apply_chat_template_assistant_mask",
                    "test_apply_chat_template_image_0",
                    "test_apply_chat_template_image_1",
                ),
            }
        )
    )

    @classmethod
    def setUpClass(cls):
        # Where the code of a custom class is, is noted in what was saved, but not in what is loaded with the package.
        cls.enterClassContext(mock.patch.object(MDMProcessor, "_auto_class", None))
        super().setUpClass()

    @staticmethod
    def prepare_processor_dict():
        return {"max_new_tokens": 8, "num_classes": 10}
