package payload

import "google.golang.org/protobuf/encoding/protowire"

// How many messages (operations, extents, ...) a manifest may hold. A few bytes of manifest can become two hundred of memory; a manifest
// of major 1 is parsed before anybody has vouched for it.
const (
	maxMessagesUnsigned = 1 << 18 // 25 times what a 2 GiB image needs
	maxMessagesSigned   = 1 << 20 // and only whoever holds a pinned key can ask for that much
	maxImageSignatures  = 256     // of images, which readers leave alone
)

// message says which fields of a message are messages themselves.
type message struct {
	fields    map[protowire.Number]*message
	few       bool // at most maxImageSignatures of them in all
	operation bool
	unread    bool // an operation that nobody looks at
}

func messageV1() *message {
	leaf := &message{}
	operation := &message{fields: map[protowire.Number]*message{4: leaf, 6: leaf}, operation: true}
	noop := &message{fields: operation.fields, operation: true, unread: true}
	procedure := &message{fields: map[protowire.Number]*message{2: operation, 3: leaf, 4: leaf}}
	return &message{fields: map[protowire.Number]*message{1: operation, 2: noop, 8: leaf, 9: leaf, 10: procedure, 11: leaf}}
}

func messageV2() *message {
	leaf := &message{}
	operation := &message{fields: map[protowire.Number]*message{4: leaf, 6: leaf}, operation: true}
	partition := &message{fields: map[protowire.Number]*message{5: {few: true}, 6: leaf, 7: leaf, 8: operation}}
	return &message{fields: map[protowire.Number]*message{11: leaf, 13: partition}}
}

// bound counts the messages in a manifest without building any of them, and refuses too many.
func bound(data []byte, in *message, limit int) error {
	n, few := 0, 0
	var walk func(data []byte, in *message) error
	walk = func(data []byte, in *message) error {
		for len(data) > 0 {
			num, typ, tag := protowire.ConsumeTag(data)
			if tag < 0 {
				return malformed("the manifest cannot be read: %v", protowire.ParseError(tag))
			}
			size := protowire.ConsumeFieldValue(num, typ, data[tag:])
			if size < 0 {
				return malformed("the manifest cannot be read: %v", protowire.ParseError(size))
			}
			sub, ok := in.fields[num]
			if ok && typ == protowire.BytesType {
				if n++; n > limit {
					return malformed("the manifest holds more than %d operations and extents", limit)
				}
				if sub.few {
					if few++; few > maxImageSignatures {
						return malformed("the manifest holds more than %d signatures of images", maxImageSignatures)
					}
				}
				body, _ := protowire.ConsumeBytes(data[tag:])
				if err := walk(body, sub); err != nil {
					return err
				}
			}
			data = data[tag+size:]
		}
		return nil
	}
	return walk(data, in)
}

// split takes the operations out of a manifest that bound has been through, as they are on the wire: parsed one at a time they take little, and all at
// once fifty times their size. own are those of the message itself, and parts, in their order, those of the messages in it that may have some.
func split(data []byte, in *message) (rest []byte, own [][]byte, parts [][][]byte) {
	for len(data) > 0 {
		num, typ, tag := protowire.ConsumeTag(data)
		size := tag + protowire.ConsumeFieldValue(num, typ, data[tag:])
		sub := in.fields[num]
		if sub == nil || typ != protowire.BytesType || !sub.operation && !sub.hasOperations() {
			rest = append(rest, data[:size]...)
			data = data[size:]
			continue
		}
		body, _ := protowire.ConsumeBytes(data[tag:])
		if !sub.operation {
			left, ops, _ := split(body, sub)
			rest = protowire.AppendBytes(protowire.AppendTag(rest, num, typ), left)
			parts = append(parts, ops)
		} else if !sub.unread {
			own = append(own, body)
		}
		data = data[size:]
	}
	return rest, own, parts
}

func (m *message) hasOperations() bool {
	for _, f := range m.fields {
		if f.operation {
			return true
		}
	}
	return false
}
