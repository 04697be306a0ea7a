#include <nanobind/nanobind.h>
void bind_rans(nanobind::module_&) {}
