// Counts what tensors on a CPU take, as torch.cuda.max_memory_allocated() does for a GPU. In a
// library of its own, which C++ links and Python loads. What the process as a whole grows by is no
// measure of a model: pages of libtorch that only one of the two has touched before count too.
#pragma once

extern "C" {
/// From now on tensors come from an allocator that counts.
void count_tensor_memory();
/// The most that tensors made since then have taken at one time, in MiB.
double peak_tensor_mib();
}
