//! \file config.h
//! config.pbtxt as Triton hands it over.

#ifndef SSD_CONFIG_H
#define SSD_CONFIG_H

#include "engine.h"
#include "errors.h"

//! JSON without blanks, members in the order of model_config.proto. A quote inside a value is escaped there, so that a
//! member's beginning is found by its very text.
class Config
{
public:
    explicit Config(TRITONBACKEND_Model* model)
    {
        TRITONSERVER_Message* message{nullptr};
        check(TRITONBACKEND_ModelConfig(model, /* configVersion = */ 1, &message));
        char const* text{nullptr};
        size_t size{0};
        TRITONSERVER_Error* const error = TRITONSERVER_MessageSerializeToJson(message, &text, &size);
        if (error == nullptr)
        {
            mText.assign(text, size);
        }
        logged(TRITONSERVER_MessageDelete(message));
        check(error);
    }

    //! A parameter's value.
    std::string parameter(std::string const& name, std::string const& absent = "") const
    {
        std::string const value = between("\"" + name + "\":{\"string_value\":\"", "\"");
        return value.empty() ? absent : value;
    }

    //! A parameter's value.
    //! \throw Refused where it is no whole number of at least 1.
    int32_t number(std::string const& name, std::string const& absent) const
    {
        std::string const text = parameter(name, absent);
        bool const whole = text.size() < 5 && text.find_first_not_of("0123456789") == std::string::npos;
        int32_t const value = whole ? std::stoi(text) : 0;
        if (value < 1)
        {
            throw Refused("parameter " + name + " is '" + text + "', expected a whole number of at least 1");
        }
        return value;
    }

    //! Holds every input and output of the ONNX file against its entry, and the other way round.
    //! \throw Refused naming the first difference.
    void require(Session const& session) const
    {
        std::string const middle = "\",\"data_type\":\"TYPE_";
        std::vector<Tensor> tensors = session.inputs;
        tensors.insert(tensors.end(), session.outputs.begin(), session.outputs.end());
        for (Tensor const& tensor : tensors)
        {
            std::string const begin = "\"name\":\"" + tensor.name + middle;
            std::string const type = between(begin, "\"");
            size_t const entry = mText.find(begin);
            std::string const dims = type.empty() ? "" : between("\"dims\":", "]", entry) + "]";
            if (type.empty())
            {
                throw Refused("config.pbtxt has no " + tensor.name + ", model.onnx has: publish the model again");
            }
            if (type != tensor.type.name || dims != tensor.dims())
            {
                throw Refused(tensor.name + " is " + type + " " + dims + " in config.pbtxt and " + tensor.type.name
                    + " " + tensor.dims() + " in model.onnx: publish the model again");
            }
        }
        size_t entries{0};
        for (size_t at = mText.find(middle); at != std::string::npos; at = mText.find(middle, at + 1))
        {
            ++entries;
        }
        if (entries != tensors.size())
        {
            throw Refused("config.pbtxt has " + std::to_string(entries) + " inputs and outputs, model.onnx has "
                + std::to_string(tensors.size()) + ": publish the model again");
        }
    }

private:
    std::string between(std::string const& begin, char const* end, size_t after = 0) const
    {
        size_t const found = mText.find(begin, after);
        size_t const from = found + begin.size();
        return found == std::string::npos ? "" : mText.substr(from, mText.find(end, from) - from);
    }

    std::string mText;
};

#endif // SSD_CONFIG_H
