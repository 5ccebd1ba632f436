// Multiway Dynamic Dense (MUDD) connections for LibTorch, arXiv 2502.12170: the
// operators and the version. The models are in models.h.
#pragma once

#include "ops.h"
#include "version.h"
