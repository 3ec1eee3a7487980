// SPDX-License-Identifier: GPL-2.0
/*
 * Let the next calls of one kernel function return at once: a notification that gets lost.
 *
 *     insmod kickcall_skip.ko symbol=eventfd_signal member=44 equals=1234 skip=1
 *     cat /sys/module/kickcall_skip/parameters/skip     # 0 once it happened
 *     rmmod kickcall_skip
 *
 * For tests on machines that are made to be broken. Linux has the same idea for functions that it
 * marks as such (kernel/fail_function.c); eventfd_signal and vring_interrupt are not.
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/uaccess.h>

static char *symbol = "";
module_param(symbol, charp, 0444);
MODULE_PARM_DESC(symbol, "the function");

static int member = -1;
module_param(member, int, 0444);
MODULE_PARM_DESC(member, "byte offset of the u32 to compare, in what the first argument points to; "
			 "-1: compare the argument itself");

static long equals = -1;
module_param(equals, long, 0444);
MODULE_PARM_DESC(equals, "which calls: those with this value; -1: all");

static unsigned long result;
module_param(result, ulong, 0444);
MODULE_PARM_DESC(result, "what a skipped call returns");

static unsigned int skip;
module_param(skip, uint, 0444);
MODULE_PARM_DESC(skip, "how many calls are still to be skipped");

/* Runs in the function's place: its caller's return address is on top of the stack. */
static noinline notrace unsigned long instead(void)
{
	return READ_ONCE(result);
}
NOKPROBE_SYMBOL(instead);

static bool matches(struct pt_regs *regs)
{
	unsigned long argument = regs_get_kernel_argument(regs, 0);
	u32 value = argument;

	if (equals < 0)
		return true;
	if (member >= 0 &&
	    copy_from_kernel_nofault(&value, (void *)(argument + member), sizeof(value)))
		return false;
	return value == equals;
}
NOKPROBE_SYMBOL(matches);

static bool one_is_left(void)
{
	unsigned int left = READ_ONCE(skip);

	while (left) {
		if (try_cmpxchg(&skip, &left, left - 1))
			return true;
	}
	return false;
}
NOKPROBE_SYMBOL(one_is_left);

static int before(struct kprobe *probe, struct pt_regs *regs)
{
	if (!matches(regs) || !one_is_left())
		return 0;
	/* ftrace gives back ip and ax, but not sp (ftrace_64.S): so no return from here. */
	instruction_pointer_set(regs, (unsigned long)instead);
	return 1;
}
NOKPROBE_SYMBOL(before);

/* Who changes ip must have one: it keeps the probe from being optimized (kprobes.rst). */
static void after(struct kprobe *probe, struct pt_regs *regs, unsigned long flags)
{
}
NOKPROBE_SYMBOL(after);

static struct kprobe probe = { .pre_handler = before, .post_handler = after };

static int __init start(void)
{
	probe.symbol_name = symbol;
	return register_kprobe(&probe);
}

static void __exit stop(void)
{
	unregister_kprobe(&probe);
}

module_init(start);
module_exit(stop);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Let the next calls of one kernel function return at once, for tests");
