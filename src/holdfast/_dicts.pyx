# cython: language_level=3
"""Dicts of thousands of members, made at once."""

from cpython.object cimport PyObject

__all__ = ["from_lists"]

cdef extern from "Python.h":
    ctypedef object (*Function "PyCFunctionWithKeywords")(object, object, object)
    ctypedef void *Method "PyCFunction"
    ctypedef struct Definition "PyMethodDef":
        const char *ml_name
        Method ml_meth
        int ml_flags
        const char *ml_doc
    int METH_VARARGS, METH_KEYWORDS
    object PyCFunction_New(Definition *definition, object self)
    object PyObject_Vectorcall(object function, PyObject *const *arguments, size_t count,
                               object names)
    PyObject **PySequence_Fast_ITEMS(object sequence)


cdef object named(object self, object positional, object arguments):
    return arguments


cdef Definition _definition = Definition(
    b"named", <Method><void *><Function>named, METH_VARARGS | METH_KEYWORDS, NULL)
cdef object _named = PyCFunction_New(&_definition, None)


def from_lists(list keys not None, list values not None):
    """A dict of these keys and values.

    The same as ``dict(zip(keys, values, strict=True))``, in a bit more than half the time. What a
    function is given by name is made by the interpreter as a table that has its size from the
    start (twice that if it would be full to the last place), of the smaller kind that holds
    nothing but str; there is no other public way to one.

    Parameters
    ----------
    keys : list of str
        Exactly str, of no class derived from it.
    values : list

    Raises
    ------
    ValueError
        There are not as many keys as values.
    """
    if len(keys) != len(values):
        raise ValueError(f"{len(keys)} keys, {len(values)} values")
    if not keys:
        return {}
    return PyObject_Vectorcall(_named, PySequence_Fast_ITEMS(values), 0, tuple(keys))
