// Multiway Dynamic Dense (MUDD) connections for LibTorch, arXiv 2502.12170: the
// operators and the version. The models are in models.h.
#pragma once

#include "ops/connection_weights.h"
#include "ops/deferred_flush.h"
#include "ops/depth_aggregate.h"
#include "ops/depth_aggregate_norm.h"
#include "ops/depth_aggregation_step.h"
#include "version.h"
