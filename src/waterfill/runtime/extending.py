"""Objects that get methods of ours and stay instances of what they were, also when copied or pickled."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["Extension", "extend"]


class Extension:
    """Base of the methods that an object gets; they come before those of its own class."""

    plain: Any  # the class that it had
    extension: Any  # the subclass of this one

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.extension, self.plain), self.__dict__


def extend(found: Any, extension: Any) -> None:
    """Let an object have the methods of an `Extension`; its attributes stay as they are."""
    plain: Any = type(found)
    found.__class__ = _class_for(extension, plain)


def _blank(extension: Any, plain: Any) -> Any:
    return object.__new__(_class_for(extension, plain))


@functools.cache
def _class_for(extension: Any, plain: Any) -> Any:
    names = {"plain": plain, "extension": extension}
    alike = {name: getattr(plain, name) for name in ("__module__", "__doc__", "__qualname__")}
    return type(plain.__name__, (extension, plain), names | alike)
