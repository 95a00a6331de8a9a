#include "kernels_headers.h"

#define RESDENSE_ISA isa_default
#define RESDENSE_ISA_NAME "DEFAULT"
#include "kernels.inc"
