// Tells ops/native.py which sources this library was built from.
extern "C" __attribute__((visibility("default"))) const char* scalemoe_cuda_source_hash() { return SCALEMOE_SOURCE_HASH; }
