// Multiway Dynamic Dense (MUDD) connections as modules, for blocks of any kind: everything public.
// The operators are in muddformer.h, whole models in models.h.
#pragma once

#include "nn/connections.h"
#include "nn/depth_aggregation.h"
#include "nn/matrices.h"
#include "nn/mudd_stack.h"
#include "nn/norm.h"
#include "nn/options.h"
#include "nn/plan.h"
