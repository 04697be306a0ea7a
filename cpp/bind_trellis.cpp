#include <nanobind/nanobind.h>
void bind_trellis(nanobind::module_&) {}
