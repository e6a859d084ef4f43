"""Numbers that are none: where a NaN or an infinity came from."""

import torch


def not_finite(value):
    """Whether a tensor or a number holds NaN or infinity."""
    return not bool(torch.as_tensor(value).isfinite().all())


@torch.no_grad()
def name_the_bad(model, batch, values):
    """The name of the first tensor, in the order in which a step makes them, that is not finite.

    model: called on batch["tokens"]; batch: {name: tensor}; values: {name: number or tensor}, what
    the step computed. First come the weights, then what the batch brought along, then each layer's
    output, then the values, then the gradients.
    """
    for name, weight in model.named_parameters():
        if not_finite(weight):
            return f"the weights {name}"
    for name, value in batch.items():
        if value.is_floating_point() and not_finite(value):
            return f"the batch's {name}"
    found = []

    def look(name):
        def hook(module, inputs, output):
            if not found and isinstance(output, torch.Tensor) and not_finite(output):
                found.append(f"the output of {name or 'the model'}")
        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    model(batch["tokens"])
    for hook in hooks:
        hook.remove()
    if found:
        return found[0]
    for name, value in values.items():
        if name != "grad_norm" and not_finite(value):
            return f"the {name}"
    for name, weight in model.named_parameters():
        if weight.grad is not None and not_finite(weight.grad):
            return f"the gradient of {name}"
    return "the " + next(iter(values))
