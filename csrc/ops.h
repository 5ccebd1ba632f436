// The operators of Multiway Dynamic Dense (MUDD) connections for LibTorch: everything public.
#pragma once

#include "ops/add_norm/add_norm.h"
#include "ops/connection_weights/connection_weights.h"
#include "ops/deferred_flush/deferred_flush.h"
#include "ops/depth_aggregate/depth_aggregate.h"
#include "ops/depth_aggregate_norm/depth_aggregate_norm.h"
#include "ops/depth_aggregation_step/depth_aggregation_step.h"
#include "ops/linear/linear.h"
#include "ops/linear_cross_entropy/linear_cross_entropy.h"
#include "ops/qk_norm_rotary/qk_norm_rotary.h"
#include "ops/swiglu/swiglu.h"
