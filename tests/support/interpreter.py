"""Triton's interpreter without work that it repeats; its results are the same."""

from functools import cache


def look_up_types_once() -> None:
    """Keep NumPy's type for each of Triton's: a table of all of them is made for every look-up."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_get_np_dtype"):  # another release of Triton
        return
    look_up, found = interpreter._get_np_dtype, {}

    def kept(dtype):
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = kept


def patch_once_a_launch() -> None:
    """Let the interpreter put its own functions into `triton.language` once a launch.

    It does so again at every call of a device function, `tl.sum` and `tl.zeros` among them, by
    looking at every member of five modules, which is half of its time; nothing takes them out again
    before the launch ends.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):  # another release of Triton
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    @cache
    def languages(fn):
        return frozenset(m.__name__ for m in (tl, tl.core) if m in fn.__globals__.values())

    def patch_lang(fn):
        if languages(fn) <= patched:
            return None
        patched.update(languages(fn))
        return patch(fn)

    def call(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = call
