// Visibility of the symbols of libmuddformer.
#pragma once

#if defined(_WIN32)
#if defined(MUDDFORMER_BUILDING)
#define MUDDFORMER_API __declspec(dllexport)
#else
#define MUDDFORMER_API __declspec(dllimport)
#endif
#else
#define MUDDFORMER_API __attribute__((visibility("default")))
#endif
