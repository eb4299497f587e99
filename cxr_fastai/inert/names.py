"""Which names a pickle of fastai's own making imports and calls, so that others stand out.

This is for people: who look at a file, or are told that theirs is an attack. No safety relies on it, since here no name
is ever imported or called, needed or not. And needed does not mean harmless: `getattr` and
`cloudpickle._make_function` can do anything, and honest exports have both.
"""

import re
import sys
from collections.abc import Iterable, Mapping

from cxr_fastai.errors import ModelFileError
from cxr_fastai.inert.records import Record, shown

# Modules whose classes an export holds objects of; a class begins with a capital letter.
PACKAGES = r"(fastai|fastcore|fasttransform|plum|torch\.nn\.modules|torchvision\.models|cxr_fastai)(\.\w+)*"
CLASS = re.compile(PACKAGES + r"\.(L|fastuple|_?[A-Z]\w*)")
METHOD = re.compile(CLASS.pattern + r"\.[a-z]\w*")  # protocol 4 names them in one

FUNCTIONS = re.compile(
    r"fastai\.(imports\.noop|data\.transforms\.\w+_(label|func)|data\.load\._wif|metrics\.\w+|vision\.core\.load_image"
    r"|vision\.augment\.\w+_mat|vision\.learner\._\w+_split|callback\.schedule\.\w+)"
    r"|fastcore\.basics\.(merge|noop|is_listy)|torchvision\.models\.\w+\.(densenet|resnet|vgg|xresnet)\w+"
    r"|cxr_fastai\.(data|model)\.\w+|torch\.distributions\.\w+\.[A-Z]\w+|numpy\.(less|greater)|sklearn\.metrics\._\w+\.\w+_(score|corrcoef)"
)
# Called while an export of fastai 2.7 or 2.8 is unpickled, besides the classes.
CALLED = frozenset({
    "collections.OrderedDict", "collections.defaultdict", "builtins.set", "builtins.bytes", "functools.partial",
    "_codecs.encode", "random.Random", "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath",
    "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2",
    "torch.device", "torch.Size", "numpy.dtype", "numpy.ndarray", "PIL.Image.Resampling",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "inspect.Signature", "inspect.Parameter", "inspect._ParameterKind",
    "pandas._libs.internals._unpickle_block", "cloudpickle.cloudpickle._make_function",
    "cloudpickle.cloudpickle._function_setstate", "cloudpickle.cloudpickle._make_empty_cell",
    "cloudpickle.cloudpickle._make_cell",
})
# Calls that say what they get, as far as that is an object of an export.
GOT = re.compile(
    r"builtins\.getattr\((fastai|cxr_fastai)(\.\w+)*\.[A-Z]\w*(\(\))?, '[a-z]\w*'\)"
    r"|cloudpickle\.cloudpickle\.subimport\('(io|PIL|PIL\.Image|torch|numpy|pandas|fastai\.[\w.]+)'\)"
    r"|cloudpickle\.cloudpickle\._builtin_type\('(MethodType|CodeType|CellType)'\)(\(\))?"
    r"|torch\.distributions\.\w+\.[A-Z]\w+|fastai\.callback\.fp16\.AMPMode"
    r"|(builtins|_?functools)\.reduce\(_operator\.or_, .*\)"
)
NAMED = frozenset({
    "builtins.getattr", "builtins.long", "builtins.int", "builtins.float", "builtins.str", "builtins.unicode",
    "builtins.tuple", "builtins.object", "builtins.list", "builtins.dict", "builtins.bool", "builtins.print",
    "builtins.NoneType", "_operator.or_", "typing.Any", "typing.Union", "inspect._empty", "pandas.Series",
    "pandas.core.series.Series", "builtins.reduce", "functools.reduce", "_functools.reduce", "torch.Tensor",
    "PIL.Image.Image", "cloudpickle.cloudpickle.subimport", "cloudpickle.cloudpickle._builtin_type",
})
STORAGE = re.compile(r"torch\.\w+Storage|torch\.storage\.UntypedStorage|torch\.(float|int|uint|bfloat)\d+|torch\.bool")


def unneeded_names(names: Iterable[str]) -> list[str]:
    """Return the names that no export of fastai's own making imports."""
    return [name for name in names if not (name in NAMED or name in CALLED or STORAGE.fullmatch(name) or _known(name))]


def unneeded_calls(calls: Iterable[str]) -> list[str]:
    """Return the calls, as `Machine.calls` lists them, that no export of fastai's own making has."""
    return [call for call in calls if not (call in CALLED or GOT.fullmatch(call) or _made(call))]


def _known(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (CLASS, METHOD, FUNCTIONS))


def _made(call: str) -> bool:
    """Tell whether a call only makes an empty object of a class that exports have."""
    return call.endswith(".__new__") and bool(CLASS.fullmatch(call.removesuffix(".__new__")))


REDUCE = frozenset({"builtins.reduce", "functools.reduce", "_functools.reduce"})
# Parts of the standard library of which people's own transforms and functions may hold objects.
HARMLESS = frozenset({
    "_codecs", "_collections_abc", "_functools", "_operator", "abc", "collections", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "inspect", "math", "numbers", "operator", "pathlib", "random", "re",
    "string", "typing", "uuid",
})
GETTING = frozenset({"builtins.getattr", "cloudpickle.cloudpickle.subimport"})  # no attack as long as it is not called
CLOUDPICKLE = "cloudpickle.cloudpickle._"  # what it needs to make functions and classes that are stored by value


def refuse_attacks(calls: Mapping[str, Record]) -> None:
    """Refuse a pickle that would call what nobody's export does: functions that are named, or that it computes.

    Objects of people's own classes are no attack, and functions that are stored but not called are none yet.

    Raises
    ------
    ModelFileError
        With the call.
    """
    for call in unneeded_calls(calls):
        if _is_attack(calls[call], made=call.endswith(".__new__")):
            raise ModelFileError(
                f"unpickling it would call {shown(calls[call])}, which no export does: it is an attack, or damaged; "
                "never load it with fastai, and get another file"
            )


def _is_attack(call: Record, made: bool) -> bool:
    called = call.made_by
    if isinstance(called, Record):  # it computes what it calls; honest ones do so for types and for their own classes
        return called.kind != f"{CLOUDPICKLE}builtin_type" and not (made and called.kind.startswith(CLOUDPICKLE))
    name = str(called)
    if name in GETTING or name.startswith(CLOUDPICKLE):
        return False
    top = called.module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "__builtin__":
        return top not in HARMLESS or name in REDUCE
    return not made and top != "__main__" and called.name.rpartition(".")[2].lstrip("_")[:1].islower()
