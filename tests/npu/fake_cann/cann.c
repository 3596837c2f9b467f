/* The calls into CANN whose answer matters when torch_npu is imported. wheel.py adds one that answers 0 for each other call
   that the wheel's libraries make. No operator is ever run: tensors are fake, and have shapes alone. */
#include <stdlib.h>

static int handle(void **out) { *out = malloc(1 << 20); return 0; }

int aclrtCreateEventExWithFlag(void **event) { return handle(event); }
int aclrtCreateStream(void **stream) { return handle(stream); }
int aclrtCreateStreamWithConfig(void **stream) { return handle(stream); }
int aclrtGetCurrentContext(void **context) { return handle(context); }
int aclrtMalloc(void **memory) { return handle(memory); }
int aclrtMallocHost(void **memory) { return handle(memory); }
int aclrtGetDevice(int *device) { *device = 0; return 0; }
int aclrtGetDeviceCount(unsigned *count) { *count = 1; return 0; }
long aclGetCompileoptSize(void) { return 1; }
const char *aclGetRecentErrMsg(void) { return ""; }
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
