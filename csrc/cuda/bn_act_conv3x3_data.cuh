#pragma once

#include "matrix.cuh"
#include "stack.cuh"
