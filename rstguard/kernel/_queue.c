/* The fast half of rstguard/kernel/nfqueue.py: many packets with one system call, their usual TCP
 * headers already read.  Whatever is unusual is handed over as bytes, for rstguard/engine/wire.py,
 * whose `parse` is the reference: where `parse` here returns a packet, it is the same packet.
 *
 * Messages and attributes are those of linux/netfilter/nfnetlink_queue.h.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <linux/netfilter.h> /* behind in.h, with which it shares definitions */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

enum {
	MOST = 64,   /* messages read at once */
	ROOM = 2048, /* bytes for one: nfqueue.py asks for 1024 of the packet, about 200 go with it */
	FIELDS = 11, /* of a Packet */
	STATES = 256,
	MOST_BASE = 24, /* bits of a mark below the highest eight */
	FRAGMENT = 0x1fff,
};

/* The fields of a Packet in the order in which `read_packet` makes them: readers.py compares them. */
#define NAMES "source destination source_port destination_port sequence acknowledgement flags window " \
	      "payload_length state window_scale"

/* The last integer made for a field that hardly changes: to make it anew costs more. */
struct memo {
	unsigned long value;
	PyObject *object;
};

struct memos {
	struct memo destination, port, window;
};

struct reader {
	PyObject_HEAD
	PyTypeObject *packet;
	struct memos memos;
	int descriptor;
	unsigned int base; /* the lowest of our bits of a mark */
	uint32_t outbound; /* the bits of a packet that the protected side sends */
	uint8_t states[STATES];
	struct mmsghdr messages[MOST];
	struct iovec parts[MOST];
	char rooms[MOST][ROOM] __attribute__((aligned(NLMSG_ALIGNTO)));
};

struct queued {
	uint32_t number, mark;
	const uint8_t *data;
	size_t length;
};

static unsigned long big16(const uint8_t *at)
{
	return (unsigned long)at[0] << 8 | at[1];
}

static unsigned long big32(const uint8_t *at)
{
	return big16(at) << 16 | big16(at + 2);
}

static PyObject *recall(struct memo *memo, unsigned long value)
{
	if (!memo->object || memo->value != value) {
		Py_XSETREF(memo->object, PyLong_FromUnsignedLong(value));
		memo->value = value;
	}
	return Py_XNewRef(memo->object);
}

static void forget(struct memos *memos)
{
	Py_CLEAR(memos->destination.object);
	Py_CLEAR(memos->port.object);
	Py_CLEAR(memos->window.object);
}

/* An IPv6 address and its tag, 2**128 (rstguard/engine/address.py). */
static PyObject *tagged(const uint8_t *address)
{
	uint8_t bytes[17] = { 1 };

	memcpy(bytes + 1, address, 16);
#if PY_VERSION_HEX >= 0x030d0000
	return PyLong_FromUnsignedNativeBytes(bytes, sizeof(bytes), Py_ASNATIVEBYTES_BIG_ENDIAN);
#else
	return _PyLong_FromByteArray(bytes, sizeof(bytes), 0, 0);
#endif
}

/* Returns where the TCP header of a usual packet begins, or 0: IPv4 without options, IPv6 without
 * extension headers, no later fragment, all of the TCP header there, lengths that fit. */
static size_t usual_header(const uint8_t *data, size_t length, unsigned long *payload)
{
	size_t start, end, header;

	if (length >= 40 && data[0] == 0x45) {
		if (data[9] != IPPROTO_TCP || big16(data + 6) & FRAGMENT)
			return 0;
		start = 20;
		end = big16(data + 2);
	} else if (length >= 60 && data[0] >> 4 == 6) {
		if (data[6] != IPPROTO_TCP)
			return 0;
		start = 40;
		end = big16(data + 4);
		end += end ? start : 0;
	} else {
		return 0;
	}
	header = start + (data[start + 12] >> 4 << 2);
	/* A length of 0 is a segmentation-offload packet over 64 KiB, or a jumbogram. */
	end = end ? end : length;
	if (header < start + 20 || end < header)
		return 0;
	*payload = end - header;
	return start;
}

/* Returns a Packet, None if the packet is not usual, or NULL with an exception set. */
static PyObject *read_packet(PyTypeObject *type, struct memos *memos, const uint8_t *data,
			     size_t length, int state, int whole_flags)
{
	unsigned long payload = 0;
	size_t start = usual_header(data, length, &payload);
	const uint8_t *tcp = data + start;
	int v4 = start == 20, whole = 1;
	PyTupleObject *packet = NULL;

	if (!start || tcp[13] & whole_flags)
		Py_RETURN_NONE;
	PyObject *fields[FIELDS] = {
		v4 ? PyLong_FromUnsignedLong(big32(data + 12)) : tagged(data + 8),
		v4 ? recall(&memos->destination, big32(data + 16)) : tagged(data + 24),
		PyLong_FromUnsignedLong(big16(tcp)),
		recall(&memos->port, big16(tcp + 2)),
		PyLong_FromUnsignedLong(big32(tcp + 4)),
		PyLong_FromUnsignedLong(big32(tcp + 8)),
		PyLong_FromUnsignedLong(tcp[13]),
		recall(&memos->window, big16(tcp + 14)),
		PyLong_FromUnsignedLong(payload),
		PyLong_FromLong(state),
		PyLong_FromLong(-1),
	};

	for (int i = 0; i < FIELDS; i++)
		whole &= fields[i] != NULL;
	/* It holds integers only, so it is in no cycle: the collector need not know of it. */
	if (whole)
		packet = PyObject_GC_NewVar(PyTupleObject, type, FIELDS);
	for (int i = 0; i < FIELDS; i++) {
		if (packet)
			PyTuple_SET_ITEM(packet, i, fields[i]);
		else
			Py_XDECREF(fields[i]);
	}
#if PY_VERSION_HEX >= 0x030e0000
	if (packet)
		packet->ob_hash = -1; /* not known yet */
#endif
	return (PyObject *)packet;
}

/* Reads one message of `size` bytes; returns whether it brings a packet.  If it is cut off, what is
 * there of it counts: the packet needs its verdict. */
static int read_message(const char *at, size_t size, uint32_t outbound, struct queued *queued)
{
	uint8_t hook = NF_INET_PRE_ROUTING;
	const struct nlmsghdr *message = (const void *)at;
	const char *end = at + size;
	int found = 0;

	*queued = (struct queued){ 0 };
	at += NLMSG_SPACE(sizeof(struct nfgenmsg));
	/* Other messages are the kernel's word on a verdict that came too late. */
	if (at > end || message->nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET))
		return 0;
	while (end - at > NLA_HDRLEN) {
		const struct nlattr *attribute = (const void *)at;
		const uint8_t *value = (const uint8_t *)at + NLA_HDRLEN;
		size_t room = end - at, length = attribute->nla_len;

		if (length < NLA_HDRLEN)
			break;
		length = (length < room ? length : room) - NLA_HDRLEN;
		switch (attribute->nla_type & NLA_TYPE_MASK) {
		case NFQA_PACKET_HDR:
			if (length >= 4) {
				queued->number = big32(value);
				found = 1;
			}
			if (length >= sizeof(struct nfqnl_msg_packet_hdr))
				hook = value[offsetof(struct nfqnl_msg_packet_hdr, hook)];
			break;
		case NFQA_MARK:
			if (length >= 4)
				queued->mark = big32(value);
			break;
		case NFQA_PAYLOAD:
			queued->data = value;
			queued->length = length;
			break;
		}
		if ((size_t)NLA_ALIGN(attribute->nla_len) >= room)
			break;
		at += NLA_ALIGN(attribute->nla_len);
	}
	if (hook == NF_INET_POST_ROUTING)
		queued->mark |= outbound;
	return found;
}

/* Returns (number, mark, Packet or bytes). */
static PyObject *as_tuple(struct reader *reader, const struct queued *queued, int whole_flags)
{
	int state = reader->states[queued->mark >> reader->base & (STATES - 1)];
	PyObject *packet, *number, *mark, *tuple;

	packet = read_packet(reader->packet, &reader->memos, queued->data, queued->length, state,
			     whole_flags);
	if (packet == Py_None) {
		Py_DECREF(packet);
		packet = PyBytes_FromStringAndSize((const char *)queued->data, queued->length);
	}
	number = PyLong_FromUnsignedLong(queued->number);
	mark = PyLong_FromUnsignedLong(queued->mark);
	tuple = packet && number && mark ? PyTuple_New(3) : NULL;
	if (!tuple) {
		Py_XDECREF(number);
		Py_XDECREF(mark);
		Py_XDECREF(packet);
		return NULL;
	}
	PyTuple_SET_ITEM(tuple, 0, number);
	PyTuple_SET_ITEM(tuple, 1, mark);
	PyTuple_SET_ITEM(tuple, 2, packet);
	return tuple;
}

PyDoc_STRVAR(receive_doc,
"receive(most, whole)\n--\n\n"
"Return up to `most` (1-64) packets that wait in the socket, each as (number, mark, packet).\n\n"
"A packet is a `Packet` if its headers are the usual ones, else bytes; so are segments that have\n"
"any of the flags in `whole`.  Does not wait; fewer than `most` packets mean that no more were there.\n\n"
"Raises OSError if the socket cannot be read.");

static PyObject *receive(struct reader *reader, PyObject *args)
{
	int most, whole_flags, got;
	PyObject *list;

	if (!PyArg_ParseTuple(args, "ii:receive", &most, &whole_flags))
		return NULL;
	if (most < 1 || most > MOST)
		return PyErr_Format(PyExc_ValueError, "most must be 1 to %d, not %d", MOST, most);
	do {
		/* It never waits, so other threads need not be let in. */
		got = recvmmsg(reader->descriptor, reader->messages, most, MSG_DONTWAIT, NULL);
		/* ENOBUFS tells that the kernel lost packets, which it counts itself. */
	} while (got < 0 && (errno == ENOBUFS || (errno == EINTR && !PyErr_CheckSignals())));
	if (PyErr_Occurred())
		return NULL;
	if (got < 0 && errno != EAGAIN)
		return PyErr_SetFromErrno(PyExc_OSError);
	list = PyList_New(0);
	for (int i = 0; list && i < got; i++) {
		struct queued queued;
		PyObject *tuple;

		if (!read_message(reader->rooms[i], reader->messages[i].msg_len, reader->outbound,
				  &queued))
			continue;
		tuple = as_tuple(reader, &queued, whole_flags);
		if (!tuple || PyList_Append(list, tuple))
			Py_CLEAR(list);
		Py_XDECREF(tuple);
	}
	return list;
}

/* Tells whether a packet can be laid out as `read_packet` does: the type is a tuple's, with nothing
 * added.  Sets an exception if not. */
static int is_packet_type(PyTypeObject *type)
{
	if (PyType_IsSubtype(type, &PyTuple_Type) && type->tp_itemsize == PyTuple_Type.tp_itemsize &&
	    type->tp_basicsize == PyTuple_Type.tp_basicsize)
		return 1;
	PyErr_SetString(PyExc_TypeError, "packet must be a type of tuple, with nothing added");
	return 0;
}

static PyObject *new_reader(PyTypeObject *type, PyObject *args, PyObject *names)
{
	int descriptor;
	unsigned int base, outbound;
	PyTypeObject *packet;
	Py_buffer states;
	struct reader *reader = NULL;

	if (names && PyDict_GET_SIZE(names))
		return PyErr_Format(PyExc_TypeError, "Reader takes no keyword arguments");
	if (!PyArg_ParseTuple(args, "iO!y*II:Reader", &descriptor, &PyType_Type, &packet, &states,
			      &base, &outbound))
		return NULL;
	if (!is_packet_type(packet))
		; /* the exception is set */
	else if (states.len != STATES)
		PyErr_Format(PyExc_ValueError, "states must be %d bytes, not %zd", STATES, states.len);
	else if (base > MOST_BASE)
		PyErr_Format(PyExc_ValueError, "base must be 0 to %d, not %u", MOST_BASE, base);
	else
		reader = (struct reader *)type->tp_alloc(type, 0);
	if (reader) {
		Py_INCREF(packet);
		reader->packet = packet;
		reader->descriptor = descriptor;
		reader->base = base;
		reader->outbound = outbound;
		memcpy(reader->states, states.buf, STATES);
		for (int i = 0; i < MOST; i++) {
			reader->parts[i] = (struct iovec){ reader->rooms[i], ROOM };
			reader->messages[i].msg_hdr.msg_iov = &reader->parts[i];
			reader->messages[i].msg_hdr.msg_iovlen = 1;
		}
	}
	PyBuffer_Release(&states);
	return (PyObject *)reader;
}

static void free_reader(struct reader *reader)
{
	PyTypeObject *type = Py_TYPE(reader);

	forget(&reader->memos);
	Py_XDECREF(reader->packet);
	type->tp_free(reader);
	Py_DECREF(type);
}

PyDoc_STRVAR(parse_doc,
"parse(packet_type, data, state, whole)\n--\n\n"
"Return the `Packet` that is in `data`, or None if `receive` would leave it as bytes.");

static PyObject *parse(PyObject *module, PyObject *args)
{
	struct memos memos = { 0 };
	PyTypeObject *type;
	Py_buffer data;
	int state, whole_flags;
	PyObject *packet = NULL;

	(void)module;
	if (!PyArg_ParseTuple(args, "O!y*ii:parse", &PyType_Type, &type, &data, &state, &whole_flags))
		return NULL;
	if (is_packet_type(type))
		packet = read_packet(type, &memos, data.buf, data.len, state, whole_flags);
	forget(&memos);
	PyBuffer_Release(&data);
	return packet;
}

static PyMethodDef reader_methods[] = {
	{ "receive", (PyCFunction)receive, METH_VARARGS, receive_doc },
	{ NULL },
};

static PyType_Slot reader_slots[] = {
	{ Py_tp_doc, "Reader(descriptor, packet_type, states, base, outbound)\n--\n\n"
		     "Reads a bound queue's socket; `states` gives a packet's state for each value of "
		     "the eight bits of its mark from `base` on, and `outbound` is added to the mark "
		     "of one that was queued in POSTROUTING." },
	{ Py_tp_new, new_reader },
	{ Py_tp_dealloc, free_reader },
	{ Py_tp_methods, reader_methods },
	{ 0, NULL },
};

static PyType_Spec reader_spec = {
	.name = "rstguard.kernel._queue.Reader",
	.basicsize = sizeof(struct reader),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = reader_slots,
};

static int fill(PyObject *module)
{
	PyObject *type = PyType_FromSpec(&reader_spec);
	int failed = !type || PyModule_AddObjectRef(module, "Reader", type) ||
		     PyModule_AddStringConstant(module, "FIELDS", NAMES) ||
		     PyModule_AddIntConstant(module, "MOST", MOST);

	Py_XDECREF(type);
	return failed ? -1 : 0;
}

static PyMethodDef functions[] = {
	{ "parse", parse, METH_VARARGS, parse_doc },
	{ NULL },
};

static PyModuleDef_Slot slots[] = {
	{ Py_mod_exec, fill },
	{ 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_queue",
	.m_doc = "Reads packets from NFQUEUE.",
	.m_methods = functions,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__queue(void)
{
	return PyModuleDef_Init(&definition);
}
