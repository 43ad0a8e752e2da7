package payload

import "google.golang.org/protobuf/encoding/protowire"

// How many messages (operations, extents, ...) a manifest may hold. Two bytes of manifest can become two hundred of memory; a manifest
// of major 1 is parsed before anybody has vouched for it.
const (
	maxMessagesUnsigned = 1 << 18 // 100 MB of memory at the worst, and 25 times what a 2 GiB image needs
	maxMessagesSigned   = 1 << 22
)

// nested says which fields of a message are messages themselves, by the path of field numbers that leads to them.
type nested map[protowire.Number]nested

func nestedV1() nested {
	operation := nested{4: nil, 6: nil}
	return nested{1: operation, 2: operation, 8: nil, 9: nil, 11: nil, 10: {2: operation, 3: nil, 4: nil}}
}

func nestedV2() nested {
	return nested{11: nil, 13: {5: nil, 6: nil, 7: nil, 8: {4: nil, 6: nil}}}
}

// bound counts the messages in a manifest without building any of them, and refuses too many.
func bound(data []byte, in nested, limit int) error {
	n := 0
	var walk func(data []byte, in nested) error
	walk = func(data []byte, in nested) error {
		for len(data) > 0 {
			num, typ, tag := protowire.ConsumeTag(data)
			if tag < 0 {
				return malformed("the manifest cannot be read: %v", protowire.ParseError(tag))
			}
			size := protowire.ConsumeFieldValue(num, typ, data[tag:])
			if size < 0 {
				return malformed("the manifest cannot be read: %v", protowire.ParseError(size))
			}
			sub, ok := in[num]
			if ok && typ == protowire.BytesType {
				if n++; n > limit {
					return malformed("the manifest holds more than %d operations and extents", limit)
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
