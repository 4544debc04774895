"""Templates: what a network is told of an image, with {label} for what it shows."""

from string import Formatter


def check_template(template: str | None) -> None:
    """Raise ValueError for a text whose braces hold anything but {label}."""
    try:
        fields = [parsed[1:] for parsed in Formatter().parse(template or "") if parsed[1] is not None]
    except ValueError as error:
        raise ValueError(f"{template!r} is no template ({error}); write {{label}}, or {{{{ for a brace") from error
    for name, form, conversion in fields:
        if name != "label" or form or conversion:
            raise ValueError(
                f"{template!r} has a field {{{name}}}, with nothing to put there; write {{label}} as it is, or {{{{ "
                "for a brace"
            )


def filled(template: str | None, label: str | None) -> str | None:
    """What a network is told of an image; nothing where the template needs a label and there is none."""
    check_template(template)
    if template is None or ("{label}" in template and label is None):
        return None
    return template.format(label=label)
