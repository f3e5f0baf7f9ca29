"""One thing of an image family broken on purpose: the parity bound has to notice. Each function takes the family."""

from workers.models import qwen_image, still


def _change_inputs(family, change):
    right = family.inputs

    def wrong(states, branches):
        inputs = right(states, branches)
        change(inputs)
        return inputs

    family.inputs = wrong


def transposed_positions(family):
    """Rows for columns."""
    _change_inputs(family, lambda inputs: inputs.update(img_ids=inputs["img_ids"][:, [0, 2, 1]]))


def exchanged_guidance(family):
    """Every row of a batch gets another row's guidance."""
    _change_inputs(family, lambda inputs: inputs.update(guidance=inputs["guidance"].roll(1)))


def exchanged_pooled(family):
    """Every row of a batch gets another row's pooled text."""
    _change_inputs(family, lambda inputs: inputs.update(pooled_projections=inputs["pooled_projections"].roll(1, 0)))


def shared_timestep(family):
    """All rows of a batch are denoised as if they were where the first one is."""

    def change(inputs):
        inputs["timestep"] = inputs["timestep"][:1].expand_as(inputs["timestep"])

    _change_inputs(family, change)


def shared_shift(family):
    """The schedule no longer depends on the picture's size."""
    still.calculate_shift = lambda *args: 0.5


def attended_padding(family):
    """The text's padding is not masked."""
    _change_inputs(family, lambda inputs: inputs.update(encoder_hidden_states_mask=None))


def plain_guidance(family):
    """Classifier-free guidance without the rescaling of its length."""
    qwen_image.rescaled_guidance = lambda cond, uncond, scale: uncond + scale * (cond - uncond)


def kept_template(family):
    """The template's beginning stays in the text."""
    qwen_image.TEMPLATE_TOKENS = 0
